"""What reading and writing of videos share: the scaling, timeouts, and words for errors."""

from __future__ import annotations

from av.error import ExitError, ProtocolNotFoundError
from av.video.reformatter import Interpolation

from svd2_jax.media.urls import scheme_of

URL_TIMEOUT_S = 10.0  # that a server may take for an answer; cameras behind slow networks take a few

# swscale's bilinear widens its filter when it shrinks a picture, which is what "antialias" means elsewhere.
# The other two flags cost nothing measurable and remove a bias of 1 to 1.5 levels from YUV to RGB.
SCALING = int(Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)


def reason(error: Exception) -> str:
    """The system's words for an error, without error number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def url_problem(url: str, error: Exception, timeout_s: float) -> str:
    """Returns why a URL cannot be opened, and what to do."""
    if isinstance(error, (ExitError, TimeoutError)):
        return f"no answer within {timeout_s:g} s; check the address and that the server is running"
    if isinstance(error, ProtocolNotFoundError):
        return f"this build of FFmpeg knows no protocol {scheme_of(url)!r}; use rtsp, rtmp, http, udp or tcp"
    return f"cannot be opened ({reason(error)}); check the address and that the server is running"
