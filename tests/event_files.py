"""What TensorBoard would show of a run."""

import struct

from tensorboardX.proto.event_pb2 import Event


def scalars(path):
    """Read an event file: records of length, checksum, event, checksum."""
    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    return found
