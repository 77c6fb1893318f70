"""transformers: importing this registers Mamba-3 language models with AutoConfig, AutoModel and AutoModelForCausalLM.

The folder is the one that `Mamba3LM.save_pretrained` writes, and either side reads what the other wrote. What works, what
raises and why: docs/transformers.md.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mamba3.hf.backbone import Mamba3LMModel
from mamba3.hf.cache import Mamba3LMCache
from mamba3.hf.configuration import Mamba3LMConfig
from mamba3.hf.modeling import Mamba3LMForCausalLM

AutoConfig.register(Mamba3LMConfig.model_type, Mamba3LMConfig, exist_ok=True)
AutoModel.register(Mamba3LMConfig, Mamba3LMModel, exist_ok=True)
AutoModelForCausalLM.register(Mamba3LMConfig, Mamba3LMForCausalLM, exist_ok=True)

# Where PEFT puts LoRA when target_modules is not given: every projection of the mixers and the MLPs.
LORA_TARGETS = ("in_proj", "out_proj", "fc1", "fc2")

__all__ = ["LORA_TARGETS", "Mamba3LMCache", "Mamba3LMConfig", "Mamba3LMForCausalLM", "Mamba3LMModel"]
