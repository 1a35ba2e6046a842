"""`python -m dllm` is the command line."""

from dllm.cli import main

if __name__ == "__main__":
    main()
