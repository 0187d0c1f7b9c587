"""Windows keep within the settings, whatever the lengths; every token belongs to exactly one step."""

from hypothesis import given
from hypothesis import strategies as st

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.windows import Schedule, Window, blocks, next_window


@st.composite
def plans(draw: st.DrawFn) -> tuple[PerceiverARConfig, int, int | None]:
    context_length = draw(st.integers(1, 24))
    num_latents = draw(st.integers(1, context_length))
    config = PerceiverARConfig(
        context_length=context_length,
        num_latents=num_latents,
        position_table=draw(st.sampled_from(["none", "learned"])),
    )
    return config, draw(st.integers(1, 40)), draw(st.none() | st.integers(1, num_latents))


@given(plans())
def test_windows_keep_within_the_settings_grow_and_refill(plan: tuple[PerceiverARConfig, int, int | None]) -> None:
    config, prompt_length, refill_latents = plan
    most, longest = config.num_latents, config.context_length
    fewer = refill_latents or max(1, most // 2)
    window, refills = None, 0
    for t in range(prompt_length, prompt_length + 100):
        previous, window = window, next_window(config, window, t, Schedule(refill_latents))
        length = t - window.start
        assert window.start >= 0
        assert 1 <= window.num_latents <= min(most, length)
        assert length <= longest
        if t <= longest:
            assert window.start == 0  # nothing is forgotten before it must be
        if previous is None:
            assert window.num_latents == (t if t <= most else fewer)
            continue
        assert window.start >= previous.start
        if window.num_latents == previous.num_latents + 1:
            grown = True
        else:
            grown = False
            refills += 1
            assert window.num_latents == fewer
            assert previous.num_latents == most or t - previous.start > longest
        assert window.start == previous.start or not grown
        assert length >= min(t, longest - (most - fewer))
    assert refills >= (99 - most) // (most - fewer + 1)


def test_windows_of_a_short_prompt_step_by_step() -> None:
    config = PerceiverARConfig(context_length=8, num_latents=4)
    window, seen = None, []
    for t in range(2, 16):
        window = next_window(config, window, t)
        seen.append((t - window.start, window.num_latents))
    # (length, latents): grow to 4, refill with 2 over the same context; at a full context refill over a shorter one.
    grow = [(2, 2), (3, 3), (4, 4), (5, 2), (6, 3), (7, 4), (8, 2)]
    assert seen == [*grow, (6, 2), (7, 3), (8, 4), (6, 2), (7, 3), (8, 4), (6, 2)]


def test_the_authors_schedule_starts_with_one_latent_and_refills_with_half() -> None:
    config = PerceiverARConfig(context_length=32, num_latents=8)
    window, seen = None, []
    for t in range(9, 24):
        window = next_window(config, window, t, Schedule(refill_latents=4, prompt_latents=1))
        seen.append(window.num_latents)
        assert window.start == 0
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5]


@given(plans())
def test_sliding_windows_use_all_latents_and_the_whole_context(
    plan: tuple[PerceiverARConfig, int, int | None],
) -> None:
    config, prompt_length, refill_latents = plan
    schedule = Schedule(refill_latents, slide=True)
    window = next_window(config, None, prompt_length, schedule)
    for t in range(prompt_length + 1, prompt_length + 60):
        previous, window = window, next_window(config, window, t, schedule)
        assert t - window.start <= config.context_length
        if not window.refill:
            assert window.num_latents == min(previous.num_latents + 1, config.num_latents)
            assert window.start == max(previous.start, t - config.context_length)
        else:
            assert config.table_sizes
            assert t - previous.start > config.context_length


def test_a_window_is_a_plain_value() -> None:
    assert Window(1, 2) == Window(1, 2)


@given(plans(), st.booleans())
def test_blocks_are_the_windows_of_a_row_from_its_first_token(
    plan: tuple[PerceiverARConfig, int, int | None], cacheable: bool
) -> None:
    config, num_tokens = plan[0].replace(positions_from_end=not cacheable), 2 * plan[1]
    window, steps = None, []
    for t in range(1, num_tokens + 1):
        window = next_window(config, window, t)
        steps.append((window.start, t - window.start - window.num_latents))
    covered = []
    for block in blocks(config, num_tokens):
        covered += [(block.start, block.prefix_len)] * (block.end - block.first)
        assert block.prefix_len <= block.first - block.start  # all of its positions are latents
        assert cacheable or block.end == block.first + 1
    assert covered == steps
