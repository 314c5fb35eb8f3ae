"""OpenAI's API: what requests and answers look like."""
