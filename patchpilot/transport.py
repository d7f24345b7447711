"""``broker_transport = "patchpilot.transport:Transport"``: kombu's Redis transport, for a broker that fails over."""

from patchpilot.backend.transport import Channel, Transport

__all__ = ["Channel", "Transport"]
