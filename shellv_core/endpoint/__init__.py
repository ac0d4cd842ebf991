"""Servers of the OpenAI chat protocol, asked by anyone: one at a time, streamed, or many within bounds."""
