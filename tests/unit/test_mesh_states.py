"""State tables: what may follow what."""

import enum

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.states import StateMachine


class Light(enum.Enum):
    OFF = 0
    ON = 1
    BROKEN = 2


LIGHT = StateMachine(
    "light", {Light.OFF: {Light.ON, Light.BROKEN}, Light.ON: {Light.OFF, Light.BROKEN}, Light.BROKEN: ()}
)


@pytest.mark.parametrize("start", Light)
@pytest.mark.parametrize("finish", Light)
def test_every_pair(start: Light, finish: Light) -> None:
    legal = {
        (Light.OFF, Light.ON),
        (Light.OFF, Light.BROKEN),
        (Light.ON, Light.OFF),
        (Light.ON, Light.BROKEN),
    }
    if (start, finish) in legal:
        LIGHT.check(start, finish)
        return
    with pytest.raises(BeamwireError) as caught:
        LIGHT.check(start, finish, story="somebody pulled the plug")
    assert caught.value.reason is Reason.ILLEGAL_STATE
    assert "somebody pulled the plug" in str(caught.value)
    assert caught.value.metadata == {"machine": "light", "start": start.name, "finish": finish.name}


def test_what_may_follow_is_told() -> None:
    with pytest.raises(BeamwireError, match=r"OFF cannot become OFF; what may follow: BROKEN, ON"):
        LIGHT.check(Light.OFF, Light.OFF)
    with pytest.raises(BeamwireError, match="terminal"):
        LIGHT.check(Light.BROKEN, Light.ON)


def test_terminal_states_are_those_that_nothing_follows() -> None:
    assert LIGHT.terminal == {Light.BROKEN}
    assert [LIGHT.is_terminal(state) for state in Light] == [False, False, True]


def test_words_are_states_too_and_an_unknown_one_leads_nowhere() -> None:
    machine = StateMachine("job", {"NEW": ["DONE"], "DONE": []})
    machine.check("NEW", "DONE")
    with pytest.raises(BeamwireError, match="LOST cannot become DONE"):
        machine.check("LOST", "DONE")


def test_staying_is_a_move_only_where_listed() -> None:
    StateMachine("buffer", {"READY": ["READY"]}).check("READY", "READY")


def test_a_table_that_leads_out_of_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="NEW leads to DONE"):
        StateMachine("job", {"NEW": ["DONE"]})
