"""What tools/crawl_prompts.py is made of."""
