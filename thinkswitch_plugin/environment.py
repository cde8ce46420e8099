"""Environment variables of other programs: the only module besides the command line that reads any.

They are not settings of ThinkSwitch: CUDA defines which devices a program may see, OpenSSL and requests name the trusted
certificates, and a key must not travel in values that are printed or stored, so it is read where it is sent.
"""

from __future__ import annotations

import os
from typing import Literal

Variable = Literal[
    "CUDA_VISIBLE_DEVICES", "OPENAI_API_KEY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "VLLM_PYTHON"
]


def variable(name: Variable) -> str | None:
    """The value of a variable; None if it is not set."""
    return os.environ.get(name)
