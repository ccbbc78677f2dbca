"""Is the service on this machine ready? `python -m service.probe`, for health checks of containers: exit status 0 or 1, and the reason.

Standard library only, so that a check every few seconds costs next to nothing.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4.0


def main() -> int:
    """Ask /readyz on port BENTOML_PORT (3000); 0 where it answers 200."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ.get("BENTOML_PORT", "3000")), timeout=TIMEOUT_SECONDS
    )
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        print(answer.read(2000).decode(errors="replace"))  # noqa: T201
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error!r}")  # noqa: T201
        return 1
    finally:
        connection.close()
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
