"""Whether the server is live and ready, as an HTTP status: KServe's two answers, and MindIE's five.

Sources: kserve/open-inference-protocol; MindIE's states as its documentation lists them.
"""

from __future__ import annotations

from glimt.server.app import Context


def live_status(context: Context) -> int:
    """200 if the engine works or is loading its model again; MindIE tells apart what is wrong."""
    host = context.service.host
    if context.config.profile == "mindie":
        return _mindie_status(context, busy=200)
    return 200 if host.is_live else 503


def ready_status(context: Context) -> int:
    """200 if a request would be answered now; busy counts as not ready only in MindIE."""
    if context.config.profile == "mindie":
        return _mindie_status(context, busy=503)
    return 200 if context.service.host.is_ready else 503


def _mindie_status(context: Context, busy: int) -> int:
    host = context.service.host
    if host.state == "failed" or not host.is_live:
        return 500
    if not host.is_ready:
        return 503
    return busy if context.service.num_open >= host.engine.max_num_seqs else 200
