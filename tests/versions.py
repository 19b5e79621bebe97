"""What an older transformers cannot do: the last one for Python 3.10 is 5.20."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

OLDER = Version(transformers.__version__) < Version("5.21")
needs_styles = pytest.mark.skipif(OLDER, reason="tensor parallelism needs transformers 5.21")
