"""Tokens and text: encoding, the text of a stream of tokens, the strings that end it. Nothing here knows a model."""
