"""Stages of `torch.distributed.pipelining`: a stage is a model of its own, and each of its micro-batches a step."""
