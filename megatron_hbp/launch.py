"""torchrun with the program's own exit code: `python -m megatron_hbp.launch [torchrun flags] pretrain_hbp.py ...`.

torchrun answers 1 and a traceback of its own whatever code a worker ends with. The workers write theirs to a file
(HBP_EXIT_CODE_FILE); this wrapper hands it on: 65 data, 70 internal, 73 disk, 75 stopped and saved, 78 configuration.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str] | None = None) -> int:
    """Launch the workers and return the exit code."""
    outer = os.environ.get("HBP_EXIT_CODE_FILE")
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(outer or Path(folder) / "code")
        code_file.unlink(missing_ok=True)
        os.environ["HBP_EXIT_CODE_FILE"] = str(code_file)
        # it would add its own report of the dead worker to the worker's one line
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        try:
            run.main(sys.argv[1:] if argv is None else argv)
        except ChildFailedError as error:
            if code_file.exists():
                return int(code_file.read_text())
            print(f"launch: {error}", file=sys.stderr)
            return 70
        finally:
            if outer is None:
                del os.environ["HBP_EXIT_CODE_FILE"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
