"""What a forward was given, read on the host: which of its rows are tokens, at which positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from insitu.transformers.rows import Batch, Run, runs_of, valid_by_position


class Inputs:
    """How a model's forward is called: by which names it takes what a row map follows from."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        is_decoder_of_two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._prefix = "decoder_" if is_decoder_of_two else ""
        self._keeps_logits = "logits_to_keep" in self._names

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given | None:
        """Return what a call was given; None where that is no batch of sequences."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        prefix = self._prefix
        tokens = named.get(f"{prefix}input_ids")
        if tokens is None:
            tokens = named.get(f"{prefix}inputs_embeds")
        if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
            return None
        num_sequences, num_tokens = tokens.shape[:2]
        keep = named.get("logits_to_keep", 0) if self._keeps_logits else 0
        if not isinstance(keep, int) or not num_tokens:
            return None
        num_logits = min(keep or num_tokens, num_tokens)
        told = named.get(f"{prefix}position_ids")
        counts_padding = told is None and f"{prefix}position_ids" in self._names
        return Given(
            num_sequences,
            num_tokens,
            num_logits,
            _positions(told, num_sequences, num_tokens),
            _mask(named.get(f"{prefix}attention_mask"), num_sequences, num_tokens),
            named.get("past_key_values"),
            counts_padding,
        )


class Given:
    """A batch of sequences on its way into a model."""

    def __init__(
        self,
        num_sequences: int,
        num_tokens: int,
        num_logits: int,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: Any,
        counts_padding: bool,
    ) -> None:
        """positions: int[num_sequences or 1, num_tokens]. mask: [num_sequences, num_seen + num_tokens], 0 for padding.

        cache: what the model has seen before. counts_padding: the model was told no positions, and counts them itself.
        """
        self.num_sequences, self.num_tokens, self.num_logits = num_sequences, num_tokens, num_logits
        self._positions, self._mask, self._cache = positions, mask, cache
        self._counts_padding = counts_padding

    @property
    def is_on_host(self) -> bool:
        """Whether its positions are read without waiting for a device."""
        return self._positions is None or self._positions.device.type == "cpu"

    def counted(self, positions: Sequence[int]) -> Batch:
        """Return it with one token a sequence, at positions that the host has counted."""
        return Batch([[Run(0, 1, position)] for position in positions], self.num_tokens, self.num_logits)

    def read(self, expected: Sequence[int]) -> Batch:
        """Return it as its tensors say; waits for a device that has them. expected: positions of the sequences' next
        tokens, where neither a tensor nor a cache says any."""
        valid = None if self._mask is None else self._mask.cpu().numpy() != 0
        told = None if self._positions is None else self._positions.cpu().numpy().astype(np.int64)
        if (num_seen := self._num_seen()) is not None or not expected:
            expected = [num_seen or 0] * self.num_sequences
        runs = [self._runs(at, valid, told, expected[at]) for at in range(self.num_sequences)]
        return Batch(runs, self.num_tokens, self.num_logits)

    def _runs(
        self, at: int, mask: NDArray[np.bool_] | None, told: NDArray[np.int64] | None, expected: int
    ) -> list[Run]:
        """Return one sequence's runs."""
        if told is not None:
            positions = told[at if len(told) > 1 else 0]
        elif mask is not None and not self._counts_padding:
            positions = (np.cumsum(mask[at]) - 1)[-self.num_tokens :]
        else:
            positions = np.arange(expected, expected + self.num_tokens)
        if mask is not None:
            return runs_of(mask[at, -self.num_tokens :], positions)
        valid = np.full(self.num_tokens, True) if told is None else valid_by_position(positions)
        return runs_of(valid, positions)

    def _num_seen(self) -> int | None:
        """Return how many tokens of each sequence the cache holds; None where there is none."""
        count = getattr(self._cache, "get_seq_length", None)
        return None if count is None else int(count())


def _positions(positions: Any, num_sequences: int, num_tokens: int) -> torch.Tensor | None:
    """Return positions where they are one a token; rotary ones of several axes count something else."""
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != num_tokens:
        return None
    return positions if positions.shape[0] in (1, num_sequences) else None


def _mask(mask: Any, num_sequences: int, num_tokens: int) -> torch.Tensor | None:
    """Return a mask of tokens; what says who sees whom (four axes, static caches) says nothing of padding by itself."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < num_tokens:
        return None
    return mask if mask.shape[0] == num_sequences else None
