"""From a Chinese LLaMA checkpoint to a chat on an ordinary CPU. The API is the steps: `from cnq.convert import convert`."""

__version__ = "0.1.0"
