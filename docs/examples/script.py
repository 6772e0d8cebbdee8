"""A plain script: counts the words of files in the background.

wakaq-worker --app=script.wakaq         in one terminal
python script.py *.txt                  in another
"""

import os
import sys
from pathlib import Path

from wakaq import WakaQ

wakaq = WakaQ(
    queues=["default"],
    url=os.environ.get("REDIS_URL", "redis://localhost:6379"),
    concurrency=2,
)


@wakaq.task
def count_words(path: str) -> None:
    count = len(Path(path).read_text().split())
    Path(f"{path}.count").write_text(f"{count}\n")


if __name__ == "__main__":
    with wakaq.batch():
        for name in sys.argv[1:]:
            # The worker may run in another folder.
            count_words.delay(str(Path(name).resolve()))
