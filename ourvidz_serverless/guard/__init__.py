"""What may be done: keys, rate limits, the content floor, and jobs that killed their process."""
