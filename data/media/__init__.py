"""Images, videos and captions, and how they become training data."""
