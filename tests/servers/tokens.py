"""Bearer tokens of the test servers: who each is for, as an authorization server would say."""

from __future__ import annotations

from typing import Any

TOKENS: dict[str, dict[str, Any]] = {
    "ann": {"client_id": "client-1", "iss": "https://issuer-1.test", "sub": "ann", "scopes": ["use"]},
    "ann-renewed": {"client_id": "client-1", "iss": "https://issuer-1.test", "sub": "ann", "scopes": ["use", "more"]},
    "ann-by-another-client": {"client_id": "client-2", "iss": "https://issuer-1.test", "sub": "ann", "scopes": ["use"]},
    "ann-of-another-issuer": {"client_id": "client-1", "iss": "https://issuer-2.test", "sub": "ann", "scopes": ["use"]},
    "bob": {"client_id": "client-1", "iss": "https://issuer-1.test", "sub": "bob", "scopes": ["use"]},
}
