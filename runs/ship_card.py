"""The model card of runs/ship.py: every figure is the run's."""

from typing import Any

from mamba3 import Mamba3Config


def _row(tokens: str, found: dict[str, float | None]) -> str:
    bits = found["bits_per_byte"]
    return f"| {int(tokens):,} | {found['perplexity']:.2f} | {'' if bits is None else f'{bits:.3f}'} |"


def card(result: dict[str, Any], config: Mamba3Config) -> str:
    """README.md of the model's folder."""
    books = result["books"]
    epochs = result["tokens"] / result["corpus_tokens"]
    kind = f"MIMO, rank {config.mimo_rank}" if config.mimo_rank > 1 else "SISO"
    rows = "\n".join(_row(tokens, found) for tokens, found in result["test"].items())
    precision = "bfloat16 autocast over float32 parameters" if result["dtype"] == "bfloat16" else "float32"
    fall = f"a linear fall over the last {result['fall']:,} steps" if result["fall"] else "no fall yet"
    devices = f"one {result['device']}" if result["devices"] == 1 else f"{result['devices']} {result['device']} (DDP)"
    end = "" if result["steps"] is None else f" of {result['steps']:,}"
    finished = "" if result["step"] == result["steps"] else f" (unfinished: step {result['step']:,}{end})"
    smoke = "\n**A smoke run on made-up tokens: nothing here means anything.**\n" if result["quick"] else ""
    return f"""---
license: apache-2.0
language: en
library_name: mamba3
tags: [mamba-3, state-space-model]
---
# A small Mamba-3 that writes like an old book{finished}
{smoke}
{result["parameters"]:,} parameters ({result["bytes"]:,} bytes of bfloat16): {len(config.layers)} layers, width
{config.d_model}, Mamba-3 {kind}, {config.d_state} state channels, vocabulary {config.vocab_size:,}. Its memory of any
text, however long, is {result["state_bytes"]:,} bytes.

## Data
{books["train"]:,} English books of the 19th and early 20th century in the public domain (from rcdm-uga/Gutenberg_Text,
computationalstylistics/100_english_novels and COST-ELTeC/ELTeC-eng), duplicates removed; whole books held out: {books["val"]}
for validation, {books["test"]} for the test below. {result["corpus_tokens"]:,} training tokens of a byte-level BPE of the
same books.

## Recipe
`runs/ship.py --rank {result["rank"]}`: AdamW (0.9, 0.95), weight decay 0.1, clipping 1.0; peak rate
{result["lr"]:g} after {result["warmup"]} steps of warm-up, then constant, then {fall}; {precision};
{result["batch_tokens"]:,} tokens a step in rows of {result["seq_len"]:,}; {result["step"]:,} steps,
{result["tokens"]:,} tokens ({epochs:.2f} passes over the corpus), {result["skipped"]} steps skipped.
On {devices}, torch {result["torch"]}, {result["tokens_per_second"]:,.0f} tokens/s. Loss over the last 50 steps
{result["train_loss"]:.3f}.

## Measured on the test books, as shipped
| context, tokens | perplexity | bits per byte |
|---|---|---|
{rows}

Perplexities of another tokenizer or corpus do not compare with these; bits per byte do, on the same text.

## A sample (temperature 0.8, top-p 0.95, seed 0)
> **{result["sample"][0]}**{result["sample"][1].replace(chr(10), chr(10) + "> ")}

## Limits
It continues prose of its period and nothing else: no instructions, no facts to rely on, no other language. The books carry
the prejudices of their time, and so can what it writes.
"""
