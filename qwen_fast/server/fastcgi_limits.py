"""The limits of a FastCGI listener."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FastCGILimits:
    """What a peer may do before it is refused or its connection closed."""

    connections: int = 1024  # open at once; a request on another one gets 503
    requests_per_connection: int = 100_000  # then it is closed, after its last answer
    params_bytes: int = 65_536  # all parameters of a request; more get 431
    params: int = 256
    unread_body_bytes: int = 65_536  # of a request's body held for the app; then the socket is not read
    idle_seconds: float = 90.0  # without a request; above the 60 s that web servers keep theirs
    params_seconds: float = 30.0  # from the beginning of a request to the end of its parameters
    body_seconds: float = 60.0  # between two parts of a body; then the request fails with 408
    write_seconds: float = 30.0  # for a peer that does not read to go on reading; then its connection is cut
    linger_seconds: float = 5.0  # a peer that still sends its body may read an early answer for so long
