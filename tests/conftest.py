"""Fixtures that several tests need."""

import pytest

from minibalora.base.errors import InputError


@pytest.fixture(scope="session")
def refuses():
    """refuses(call, *parts): the call raises InputError, whose message is one line and has all the parts."""

    def check(call, *parts):
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        for part in parts:
            assert str(part) in message, message

    return check
