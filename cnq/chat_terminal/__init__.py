"""The chat as a person sees it: what is typed, what is drawn. The conversation itself is cnq/chat.py."""
