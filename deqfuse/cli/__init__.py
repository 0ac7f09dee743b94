"""The command line: ``deqfuse demo``, ``train``, ``info``. Start reading in ``main.py``."""
