"""What a request says of where its streamer runs, what that needs, and what consumers need of the events."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from beamwire.client.values import INT32_MAX, INT64_MAX, Values, kind_of
from beamwire.job.v1 import job_service_pb2 as job_pb2
from beamwire.request.v1 import request_service_pb2 as request_pb2

_PLACEMENT_KEYS = frozenset({"backend", "queue", "account", "reservation", "attributes"})
_RESOURCE_COUNTS = {
    "nodes": "node_count",
    "processes_per_node": "processes_per_node",
    "cores_per_process": "cores_per_process",
    "gpus_per_process": "gpus_per_process",
}
_RESOURCE_KEYS = frozenset({*_RESOURCE_COUNTS, "memory_bytes", "duration", "exclusive"})
_CONTRACT_KEYS = frozenset({"bridge", "arrays", "batch_size"})
_ARRAY_KEYS = frozenset({"field", "dtype", "shape", "scalar", "optional"})


class Demands(Values):
    """Reads these parts of a request."""

    def placement(self, path: str, value: object) -> job_pb2.Placement:
        """Return where something runs."""
        placement = job_pb2.Placement()
        mapping = self.mapping(path, value, _PLACEMENT_KEYS, "`backend: slurm`, say")
        for key in ("backend", "queue", "account", "reservation"):
            setattr(placement, key, self.text(f"{path}.{key}", mapping.get(key)))
        placement.attributes.update(self.words_by_name(f"{path}.attributes", mapping.get("attributes")))
        return placement

    def resources(self, path: str, value: object) -> job_pb2.Resources:
        """Return what the streamer needs besides its processes."""
        resources = job_pb2.Resources()
        mapping = self.mapping(path, value, _RESOURCE_KEYS, "`nodes: 2`, say; `processes` stands beside it")
        for key, field in _RESOURCE_COUNTS.items():
            setattr(resources, field, self.count(f"{path}.{key}", mapping.get(key), INT32_MAX, least=1))
        resources.memory_bytes = self.count(f"{path}.memory_bytes", mapping.get("memory_bytes"), INT64_MAX, least=1)
        resources.exclusive = self.flag(f"{path}.exclusive", mapping.get("exclusive"))
        if mapping.get("duration") is not None:
            resources.duration.CopyFrom(self.length(f"{path}.duration", mapping["duration"]))
        return resources

    def contract(self, path: str, value: object) -> request_pb2.ConsumerContract:
        """Return what consumers need."""
        mapping = self.mapping(path, value, _CONTRACT_KEYS, "`bridge: peaknet`, say")
        arrays = mapping.get("arrays") or []
        if not isinstance(arrays, list | tuple):
            self.problems.add(f"{path}.arrays", f"must be a list of arrays, not {kind_of(arrays)}")
            arrays = []
        return request_pb2.ConsumerContract(
            bridge=self.text(f"{path}.bridge", mapping.get("bridge")),
            arrays=[self._array(f"{path}.arrays[{index}]", item) for index, item in enumerate(arrays)],
            batch_size=self.count(f"{path}.batch_size", mapping.get("batch_size"), INT32_MAX),
        )

    def _array(self, path: str, value: object) -> request_pb2.ConsumerContract.Array:
        mapping = self.mapping(path, value, _ARRAY_KEYS, "`field: detector_data`, say")
        array = request_pb2.ConsumerContract.Array(
            field=self.text(f"{path}.field", mapping.get("field")),
            dtype=self.text(f"{path}.dtype", mapping.get("dtype")),
            scalar=self.flag(f"{path}.scalar", mapping.get("scalar")),
            optional=self.flag(f"{path}.optional", mapping.get("optional")),
        )
        if not array.field:
            self.problems.add(f"{path}.field", "is missing; it names the array in the batch")
        shape = mapping.get("shape") or []
        if isinstance(shape, list | tuple) and all(_is_length(item) for item in shape):
            array.shape.extend(shape)
        else:
            self.problems.add(f"{path}.shape", f"must be a list of lengths, -1 for any, not {shape!r}")
        return array

    def mapping(self, path: str, value: object, known: Collection[str], example: str) -> Mapping[str, object]:
        """Return a mapping that has known keys only."""
        if not isinstance(value, Mapping):
            self.problems.add(path, f"must be a mapping, {example}, not {kind_of(value)}")
            return {}
        for key in value:
            if key not in known:
                self.problems.unknown_key(f"{path}.{key}", str(key), known)
        return value


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= INT64_MAX
