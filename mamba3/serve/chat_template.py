"""Messages to text by a model's own chat template (Jinja, as in tokenizer_config.json), and text to tokens.

A special token that a user spells out in a message stays text: it cannot end a turn or begin another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mamba3.text.encode import encode

PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
_MARK = "\ue000{}\ue001"  # private characters that stand for a special token spelled out in a message
_MARKED = re.compile("\ue000(\\d+)\ue001")

Message = Mapping[str, str]


class ChatTemplate:
    """stops: texts that end a reply of this template. special: names such as bos_token with the token's text."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, special: Mapping[str, str] | None = None, stops: Sequence[str] = ()
    ):
        self.stops, self._tokenizer, self._special = tuple(stops), tokenizer, dict(special or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"The chat template cannot be read: {error}.") from error
        added = tokenizer.get_added_tokens_decoder().values()
        self._spelled = sorted((token.content for token in added if token.special), key=len, reverse=True)

    @classmethod
    def of_model(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that lies beside a model, None where there is none."""
        path, source = folder / "tokenizer_config.json", None
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif isinstance(values.get("chat_template"), str):
            source = values["chat_template"]
        if source is None:
            return None
        named = {name: value for name, value in values.items() if name.endswith("_token")}
        special = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
        return cls(source, tokenizer, {name: value for name, value in special.items() if isinstance(value, str)})

    def first(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """A conversation as text, up to where the reply begins, and its tokens."""
        marked = self._render(self._marked(messages), prompt=True)
        return self._unmark(marked), self._encode(marked)

    def following(self, said: str, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """What follows `said`, a conversation that ends with a reply, to add messages to it: text and tokens.

        It is what the template puts behind a reply (of which `said` may hold a part, such as the token that ends a turn) and
        between the turns before and the new ones.
        """
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\ue002"}]
        ended = self._render(before, prompt=False)
        whole = self._render([*before, *self._marked(messages)], prompt=True)
        if not whole.startswith(ended) or "\ue002" not in ended:
            raise ValueError(
                "This chat template writes earlier turns anew when messages are added; send the whole conversation."
            )
        closing = ended.rpartition("\ue002")[2]
        known = next(n for n in range(len(closing), -1, -1) if said.endswith(closing[:n]))
        marked = closing[known:] + whole[len(ended) :]
        return self._unmark(marked), self._encode(marked)

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._special)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses these messages: {error}.") from error

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        marked = []
        for message in messages:
            content = message["content"].replace("\ue000", "").replace("\ue001", "").replace("\ue002", "")
            for i, spelled in enumerate(self._spelled):
                content = content.replace(spelled, _MARK.format(i))
            marked.append({**message, "content": content})
        return marked

    def _unmark(self, marked: str) -> str:
        return _MARKED.sub(lambda match: self._spelled[int(match[1])], marked)

    def _encode(self, marked: str) -> list[int]:
        """Tokens of a rendered text: what the template wrote with its special tokens, what was marked without."""
        parts = _MARKED.split(marked)
        tokens: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                tokens += encode(self._tokenizer, [self._spelled[int(part)]])[0].tolist()
            elif part:
                tokens += self._tokenizer.encode(part, add_special_tokens=False).ids
        return tokens


def _refuse(message: str) -> Any:
    raise TemplateError(message)
