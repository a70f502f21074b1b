"""Sample images: their prompts, and how and when they are drawn and written."""
