"""An OpenAI-compatible server over `dllm.Engine` (extra `[serve]`): `dllm serve MODEL` (docs/serve.md).

limits -> requests -> engine -> stream -> answers
"""
