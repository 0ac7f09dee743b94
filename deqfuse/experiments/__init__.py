"""The papers' experiments: ``deqfuse experiment NAME``. ``import deqfuse`` does not import this."""
