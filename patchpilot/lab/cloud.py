"""The ElastiCache API over HTTP: moto's server, with the operations that moto lacks.

moto promises none of the seams used here, so its version is pinned and `tests/contract/test_simulator_moto.py` holds
them. Operations that this lab does not model (users, tags, subnet groups) are still moto's own, as are the other AWS
services.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from xml.sax.saxutils import escape

from moto.core.responses import ActionResult
from moto.elasticache import urls
from moto.elasticache.exceptions import ElastiCacheException
from moto.elasticache.responses import ElastiCacheResponse
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from patchpilot.errors import Unsafe
from patchpilot.lab.api import Api, Fault, Operator
from patchpilot.lab.disturbances import DisturbedApi
from patchpilot.lab.launch import HOST
from patchpilot.lab.scenario import CALM, Scenario
from patchpilot.lab.world import World

_POLL_SECONDS = 0.02
_ERROR = (
    '<ErrorResponse xmlns="http://elasticache.amazonaws.com/doc/2015-02-02/"><Error><Type>Sender</Type>'
    "<Code>{code}</Code><Message>{message}</Message></Error><RequestId>lab</RequestId></ErrorResponse>"
)


class Cloud:
    """A running simulator.

    :param operators: who works on the nodes, by replication group.
    :param calls: a JSON-lines file that gets one line for each ElastiCache call, when it arrives and whatever becomes
        of it: `time` (UTC, ISO 8601), `action` and `parameters`.
    :param asked: called when somebody asks for an operation on the nodes, before anything comes of it.
    """

    def __init__(
        self,
        world: World,
        operators: Mapping[str, Operator],
        *,
        calls: Path,
        scenario: Scenario = CALM,
        asked: Callable[[], None] = lambda: None,
    ) -> None:
        self.world = world
        self.calls = calls
        api = Api(world, operators, most_rows=scenario.page_size)
        self.api = DisturbedApi(api, world, scenario, asked=asked)
        self._writing = threading.Lock()
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The endpoint URL for boto3."""
        if self._server is None:
            raise Unsafe("the simulator does not run")
        return f"http://{HOST}:{self._server.server_port}"

    def start(self) -> None:
        """Answer requests, on a free port."""
        install()
        self.world.start()
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        # What moto's own ThreadedMotoServer does, except that this one stops at once.
        application = DomainDispatcherApplication(create_backend_app)
        front = _Front(application, self.api)
        self._server = make_server(HOST, 0, front, threaded=True, request_handler=MotoRequestHandler)
        LabResponse.clouds[self._server.server_port] = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _POLL_SECONDS}, name="simulator", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            del LabResponse.clouds[self._server.server_port]
            self._server = self._thread = None

    def record(self, action: str, parameters: Mapping[str, Any]) -> None:
        """Write one call down."""
        row = {"time": self.world.now().isoformat(), "action": action, "parameters": parameters}
        with self._writing, self.calls.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row, default=str) + "\n")


class _Front:
    """Lets CloudWatch's operations fail as the scenario says, before moto hears of them."""

    _TARGET = "GraniteServiceVersion20100801."

    def __init__(self, application: Any, api: DisturbedApi) -> None:
        self._application, self._api = application, api

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        service, _, action = environ.get("HTTP_X_AMZ_TARGET", "").partition(self._TARGET)
        try:
            if action and not service:
                self._api.trip(action, of_cloudwatch=True)
        except Fault as fault:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{fault.status or 400} Failed", [("Content-Type", "application/x-amz-json-1.0")])
            return [json.dumps({"__type": fault.code, "message": fault.message}).encode()]
        return self._application(environ, start)


def install() -> None:
    """Make moto's servers in this process dispatch ElastiCache requests to :class:`LabResponse`.

    A server looks its routes up at its first request, so this has to come before. Requests that reach moto in any other
    way are answered by moto as ever.
    """
    urls.url_paths["{0}/$"] = LabResponse.dispatch


class LabResponse(ElastiCacheResponse):
    """One request. moto calls the method that is named like the action."""

    clouds: ClassVar[dict[int, Cloud]] = {}
    """The running simulators of this process, by port."""

    def call_action(self) -> Any:
        """Log the call, and answer what neither the lab nor moto knows in the way of AWS instead of with a 500."""
        cloud = self._cloud()
        if cloud is None:
            return super().call_action()
        action = self._get_action()
        cloud.record(action, getattr(self, "params", {}))
        try:
            if not cloud.api.answers(action):
                cloud.api.trip(action)
            return super().call_action()
        except NotImplementedError as error:
            # Of the codes for this, botocore's model knows this one.
            return self._failed(Fault("InvalidParameterValue", str(error)))
        except Fault as fault:
            return self._failed(fault)

    def _failed(self, fault: Fault) -> Any:
        if fault.status is not None:
            # moto serialises only the codes in ElastiCache's model, and those that all of AWS has are not among them.
            return fault.status, {"status": str(fault.status), "Content-Type": "text/xml"}, _ERROR.format(
                code=escape(fault.code), message=escape(fault.message)
            )  # fmt: skip
        status, headers, body = self.serialized(ActionResult(ElastiCacheException(fault.code, fault.message)))
        return status, {**headers, "status": str(status)}, body

    def describe_replication_groups(self) -> ActionResult:
        return self._answer() or super().describe_replication_groups()

    def describe_cache_clusters(self) -> ActionResult:
        return self._answer() or super().describe_cache_clusters()

    def describe_snapshots(self) -> ActionResult:
        return self._answer() or super().describe_snapshots()

    def describe_cache_parameters(self) -> ActionResult:
        return self._modelled()

    def describe_service_updates(self) -> ActionResult:
        return self._modelled()

    def describe_update_actions(self) -> ActionResult:
        return self._modelled()

    def describe_events(self) -> ActionResult:
        return self._modelled()

    def batch_apply_update_action(self) -> ActionResult:
        return self._modelled()

    def batch_stop_update_action(self) -> ActionResult:
        return self._modelled()

    def test_failover(self) -> ActionResult:
        return self._modelled()

    def modify_replication_group(self) -> ActionResult:
        return self._modelled()

    def describe_cache_engine_versions(self) -> ActionResult:
        return self._modelled()

    def list_allowed_node_type_modifications(self) -> ActionResult:
        return self._modelled()

    def _modelled(self) -> ActionResult:
        answer = self._answer()
        if answer is None:
            raise NotImplementedError(f"{self._get_action()} is answered by a lab's own server only")
        return answer

    def _answer(self) -> ActionResult | None:
        cloud = self._cloud()
        if cloud is None:
            return None
        api = cloud.api if self.region == cloud.world.region else Api(World(region=self.region), {})
        return ActionResult(api.answer(self._get_action(), self.params))

    def _cloud(self) -> Cloud | None:
        port = self.normalized_request.environ.get("SERVER_PORT", "")
        return self.clouds.get(int(port)) if str(port).isdigit() else None
