"""Answers for people: streamed text, terminal chat, the comparison page."""
