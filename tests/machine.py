"""What a test needs of the machine it runs on."""

import pytest

from models.errors import LeanRecError
from models.precision import check_int8_products


def _has_int8_products() -> bool:
    try:
        check_int8_products("the tests")
    except LeanRecError:
        return False
    return True


HAS_INT8_PRODUCTS = _has_int8_products()
needs_int8_products = pytest.mark.skipif(not HAS_INT8_PRODUCTS, reason="this CPU's int8 products overflow")
