"What the tests of the export share"
from deployed import photos # noqa: F401 - a fixture
