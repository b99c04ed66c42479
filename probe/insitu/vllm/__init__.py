"""vLLM observed from inside: where its ranks' time goes, whose rows they ran, what the model computed.

vLLM loads `plugin.register` in each of its processes. It holds on to few names of vLLM, each looked for before it is
used (`hooks`), of the versions in `versions`; what is not there is said in one line and not observed. What is seen in
which mode: docs/integrations.md.
"""
