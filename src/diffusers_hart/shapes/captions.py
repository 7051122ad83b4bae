# SPDX-License-Identifier: Apache-2.0
from random import Random

from .scenes import Scene, SceneObject, StatedObject, Statement
from .vocabulary import VOCABULARY, Vocabulary


def caption_scene(
    rng: Random, scene: Scene, relation: str | None, vocabulary: Vocabulary = VOCABULARY
) -> tuple[str, Statement]:
    """
    A caption in words of the vocabulary, and what it states. Shapes, colours and patterns are always named, sizes half
    of the time, backgrounds a third of it; of several objects one relation is.

    Args:
        rng (`random.Random`): Source of the wording.
        scene ([`Scene`]): The picture.
        relation (`str`, *optional*): How its first object lies to the second, if there is one.
        vocabulary ([`Vocabulary`]): The words.
    """
    described = [_describe(rng, found, vocabulary) for found in scene.objects]
    phrases = [phrase for phrase, _ in described]
    if relation is None:
        text = rng.choice(("{0}", "{0}", "{0}", "a picture of {0}", "an image of {0}", "there is {0}")).format(
            *phrases
        )
    else:
        text = _relate(rng, scene, phrases, rng.choice(vocabulary.relations[relation]), vocabulary)
    background = None
    if rng.random() < 0.35:
        background = scene.background
        text += rng.choice((" on ", " on ", " in front of ", " against ")) + _background_phrase(rng, background)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:] + rng.choice(("", "."))
    return text, Statement(tuple(stated for _, stated in described), relation, background)


def _describe(rng: Random, found: SceneObject, vocabulary: Vocabulary) -> tuple[str, StatedObject]:
    """A phrase with its article, such as `a small striped red circle`."""
    shape, surface = vocabulary.shapes[found.shape], vocabulary.surfaces[found.surface]
    color = _usual_first(rng, (found.color, *vocabulary.color_words.get(found.color, ())))
    size = _usual_first(rng, vocabulary.size_words[found.size]) if rng.random() < 0.5 else None
    states_surface = found.surface != "plain" or (not shape.is_glyph and rng.random() < 0.2)
    adjective, phrase = None, None
    if states_surface:
        adjective, phrase = _usual_first(rng, surface.adjectives), None
        if surface.phrases and rng.random() < 0.35:
            adjective, phrase = None, rng.choice(surface.phrases)
    words = [size, adjective, color] if rng.random() < 0.5 else [size, color, adjective]
    words = [word for word in (*words, _usual_first(rng, shape.nouns), phrase) if word is not None]
    stated = StatedObject(
        found.shape, found.color, found.surface if states_surface else None, None if size is None else found.size
    )
    return with_article(" ".join(words)), stated


def _relate(rng: Random, scene: Scene, phrases: list[str], relation: str, vocabulary: Vocabulary) -> str:
    names = [vocabulary.shapes[found.shape].nouns[0] for found in scene.objects]
    if len(set(names)) == len(names) and rng.random() < 0.2:  # all objects first, then how two of them lie
        listed = " and ".join((", ".join(phrases[:-1]), phrases[-1]))
        return f"{listed}, the {names[0]} {relation} the {names[1]}"
    forms = {
        2: ("{0} {r} {1}", "{0} {r} {1}", "{0} is {r} {1}", "there is {0} {r} {1}", "a picture of {0} {r} {1}"),
        3: (
            "{0} {r} {1}, and {2}",
            "{0} {r} {1} and {2}",
            "{2}, and {0} {r} {1}",
            "{0} is {r} {1}, there is also {2}",
        ),
    }
    return rng.choice(forms[len(phrases)]).format(*phrases, r=relation)


def _background_phrase(rng: Random, background: tuple[str, ...]) -> str:
    if len(background) == 1:
        return f"a {rng.choice(('', 'plain '))}{background[0]} background"
    first, second = background if rng.random() < 0.5 else background[::-1]
    return rng.choice(("a background fading from {} to {}", "a gradient from {} to {}")).format(first, second)


def _usual_first(rng: Random, words: tuple[str, ...]) -> str:
    """The first word most of the time, otherwise any other."""
    return words[0] if len(words) == 1 or rng.random() < 0.6 else rng.choice(words[1:])


def with_article(noun_phrase: str) -> str:
    """`noun_phrase` after `a` or `an`."""
    return f"an {noun_phrase}" if noun_phrase[0] in "aeiou" else f"a {noun_phrase}"
