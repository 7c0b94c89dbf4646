"""The stage that computes the covariance of vectors over the events, as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.fields import pick
from beamwire.services.streamer.stages.running import Every, RunningResult, events_of

Values = npt.NDArray[np.float64]
LIMIT = 8192
"""Values of a vector, at most: the matrix has 512 MiB then."""
BLOCK = 256
"""Events whose products are computed at once."""


class Covariance(RunningResult):
    """The covariance matrix of an array (d,) over all events so far, divided by their number less one, as numpy.cov.

    With `partial_to` it is the partial covariance: what is left when all that goes linearly with those arrays,
    the pulse energy, say, is taken away: C_xx - C_xi C_ii^-1 C_ix.

    `output` (d, d), `<output>_mean` (d,), both float64, and `<output>_events` int64 have a row in every `every`-th
    event and in the last one; a covariance of fewer than two events is NaN. The last rows of two ranks, n events,
    mean m, M = (n - 1) C each, become one by M = M1 + M2 + (m2 - m1)(m2 - m1)^T n1 n2 / (n1 + n2); this is also how
    blocks of events are added here, so that nothing is lost where the mean is large beside the deviation. Partial
    covariances do not add up so.
    """

    class Parameters(ComponentParameters):
        """`partial_to` names arrays of single numbers or vectors; `output` is `<field>_covariance` if it is absent."""

        field: str
        output: str = ""
        partial_to: tuple[str, ...] = ()
        every: Every = 1000

    def __init__(self, parameters: Covariance.Parameters) -> None:
        super().__init__(parameters.every)
        self._names = (parameters.field, *parameters.partial_to)
        self._output = parameters.output or f"{parameters.field}_covariance"
        self._size = 0
        self._moments = Moments(0)

    def made(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The matrix, the mean, and of how many events they are."""
        field, *partial_to = self._names
        spec = pick(fields, field, ndim={1})
        self._size = spec.shape[0]
        others = [pick(fields, name, parameter="partial_to", ndim={0, 1}) for name in partial_to]
        whole = self._size + sum(int(np.prod(other.shape)) for other in others)
        if whole > LIMIT:
            raise invalid_field("field", f"has {whole} values; {LIMIT} at most fit, take fewer bins")
        self._moments = Moments(whole)
        float64 = np.dtype(np.float64)
        return [
            FieldSpec(self._output, float64, (self._size, self._size), f"({spec.unit})^2" if spec.unit else ""),
            FieldSpec(f"{self._output}_mean", float64, (self._size,), spec.unit),
            events_of(self._output),
        ]

    def add(self, batch: Batch, events: slice) -> None:
        """Adds the vectors of these events."""
        columns: list[Values] = []
        for name in self._names:
            array = batch.arrays[name]
            assert not isinstance(array, Ragged)
            columns.append(array[events].reshape(events.stop - events.start, -1).astype(np.float64))
        self._moments.add(np.concatenate(columns, axis=1))

    def row(self) -> Sequence[Array]:
        """The covariance so far."""
        count, mean, covariance = self._moments.result()
        size = self._size
        within = covariance[:size, :size]
        if size < len(mean) and count > 1:
            across = covariance[:size, size:]
            # What does not vary explains nothing, so a singular matrix is no error.
            within = within - across @ np.linalg.pinv(covariance[size:, size:], hermitian=True) @ across.T
        return within, mean[:size], np.array(count)


class Moments:
    """Mean and covariance of vectors that come one after another (Chan, Golub, LeVeque 1979)."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._mean = np.zeros(size)
        self._products = np.zeros((size, size))
        self._block = np.empty((BLOCK, size))
        self._filled = 0

    def add(self, values: Values) -> None:
        """Adds vectors (events, size)."""
        while len(values):
            taken = min(BLOCK - self._filled, len(values))
            self._block[self._filled : self._filled + taken] = values[:taken]
            self._filled += taken
            values = values[taken:]
            if self._filled == BLOCK:
                self._fold()

    def result(self) -> tuple[int, Values, Values]:
        """The number of vectors, their mean (size,) and covariance (size, size), NaN if there are fewer than two."""
        self._fold()
        if self._count < 2:
            return self._count, self._mean.copy(), np.full_like(self._products, np.nan)
        return self._count, self._mean.copy(), self._products / (self._count - 1)

    def _fold(self) -> None:
        """Adds the block, its products about its own mean."""
        fresh, self._filled = self._filled, 0
        if not fresh:
            return
        block = self._block[:fresh]
        mean = block.mean(axis=0)
        block -= mean
        away = mean - self._mean
        total = self._count + fresh
        self._products += block.T @ block
        self._products += np.outer(away, away) * (self._count * fresh / total)
        self._mean += away * (fresh / total)
        self._count = total
