"""An OpenAI-compatible server over `mamba3.engine`, with sessions (docs/serving.md). Needs `pip install 'mamba3[serve]'`."""

from mamba3.serve.app import create_app
from mamba3.serve.chat_template import PLAIN, PLAIN_STOPS, ChatTemplate
from mamba3.serve.service import ServeConfig, Service

__all__ = ["PLAIN", "PLAIN_STOPS", "ChatTemplate", "ServeConfig", "Service", "create_app"]
