"""Text on its way in and out: tokenizer, chat template, conversations, documents."""
