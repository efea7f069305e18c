"""Metrics of speech and songs: are the right words heard, in the right voice, on the right notes?

The listener (nanogen/listener.py) writes down what it hears and compares voices; the pitch of a
note is measured by its autocorrelation. Real recordings are measured, too: they show the error of
the measurement itself.

    words right        1 - edits / words: a word that is missing, wrong or too many is an edit
    equal error rate   of telling "the voice of the prompt" from "the voice of another prompt"; also
                       with the prompts as the codec copies them (SIM-o and SIM-r in Voicebox)
    cents              a hundredth of a semitone: how far a note is from the one of the score
"""

import numpy as np
import torch
from torch import Tensor

from nanogen.audio.speech import PAUSE
from nanogen.data import songs, utterances, voices
from nanogen.data.datasets import Dataset
from nanogen.data.sources import SAMPLE_RATE
from nanogen.lab import machine, sound_metrics
from nanogen.lab.dubbing import dub, listen
from nanogen.lab.prepare import every
from nanogen.lab.runs import Run
from nanogen.lab.sample import cut, timed_sample, write_samples
from nanogen.listener import Listener, edits, equal_error_rate
from nanogen.method import Method

PROMPT = 2.0  # seconds of a voice prompt
STRETCHES = (0.7, 1.4)  # times the natural length
DUBBED = 10  # clips of each language that are dubbed into all


def score_of(wanted: list[list[int]], heard: list[list[int]]) -> float:
    """The fraction of words right, over all sounds; a sound has at most as many edits as words."""
    wrong = sum(min(edits(said, got), len(said)) for said, got in zip(wanted, heard, strict=True))
    return 1 - float(wrong) / sum(map(len, wanted))


def words_right(listener: Listener, clips: list[np.ndarray], words: np.ndarray) -> float:
    """`score_of` clips (T,) with these words (N, L), -1 after the last."""
    return score_of([row[row >= 0].tolist() for row in words], listen(listener, clips)[0])


def voice_error(vectors: Tensor, others: Tensor, speakers: np.ndarray) -> float:
    """The equal error rate of vectors (N, V) against one other recording of each, in this order;
    all pairs of two speakers are the different ones."""
    cosines = (vectors @ others.T).numpy()
    different = speakers[:, None] != speakers
    return equal_error_rate(np.diag(cosines), cosines[different])


def parts(test: dict, rows: list[int]) -> tuple[list[np.ndarray], list[np.ndarray], list[list]]:
    """Recordings of two parts -> the first ones without the pause, the second ones, their words."""
    first, second, words = [], [], []
    for i in rows:
        clip, begin = test["waveforms"][i], test["begin"][i]
        heard = np.flatnonzero(test["frames"][i, :begin])  # phonemes, not silence
        first.append(clip[: (heard[-1] + 1) * utterances.HOP])
        second.append(clip[begin * utterances.HOP :])
        words.append([10 * test["language"][i, 1] + int(digit) for digit in test["prompts"][i]])
    return first, second, words


def voice_prompts(test: dict, first: list[np.ndarray], rows: list[int]) -> list[np.ndarray]:
    """PROMPT seconds of the voice of each of the rows, or less where a voice has less: the end of
    the first parts of all of its recordings, joined with short pauses; its own comes last. first:
    the first parts (T,) of all recordings, in their order."""
    prompts, speakers = [], test["speakers"]
    pause = np.zeros(PAUSE * utterances.HOP, dtype=np.float32)
    for i in rows:
        others = [j for j in np.flatnonzero(speakers == speakers[i]) if j != i]
        pieces = [piece for j in [*others, i] for piece in (pause, first[j])]
        prompts.append(np.concatenate(pieces)[-int(PROMPT * SAMPLE_RATE):])
    return prompts


def evaluate_listener(listener: Listener, dataset: Dataset) -> dict:
    """The listener itself on all test recordings."""
    clips = dataset.test["waveforms"]
    result = {"words_right": words_right(listener, clips, dataset.test["words"])}
    if "begin" in dataset.test:
        first, second, _ = parts(dataset.test, range(len(clips)))
        vectors, others = (listen(listener, clips)[1] for clips in (first, second))
        result["voice_error"] = voice_error(vectors, others, dataset.test["speakers"])
    return result


@torch.no_grad()
def codec_copies(codec: Method, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Clips (T,), encoded and decoded: the best that a model of the codec's latents can reach."""
    sounds = [torch.from_numpy(clip)[None].to(machine.device()) for clip in clips]
    copies = [codec.decode_latents(codec.latents(sound))[0].cpu().numpy() for sound in sounds]
    return [copy[: len(clip)] for copy, clip in zip(copies, clips, strict=True)]


def evaluate_speech(run: Run, dataset: Dataset, listener: Listener, n: int, seed: int,
                    settings: dict) -> dict:
    """Metrics of n test recordings, by voices that training did not have: the words of their second
    part are said, in the voice of first parts. Again at other lengths; and the first parts are
    dubbed."""
    test = dataset.test
    rows = every(n, len(test["waveforms"]))
    all_first, all_second, all_words = parts(test, range(len(test["waveforms"])))
    first, second, words = ([part[i] for i in rows] for part in (all_first, all_second, all_words))
    prompts = voice_prompts(test, all_first, rows)
    speakers, language = test["speakers"][rows], test["language"][rows, 1]
    names = np.array(run.names["languages"])
    codec = run.model.codec
    of_prompts, of_copies = (listen(listener, clips)[1]
                             for clips in (prompts, codec_copies(codec, prompts)))
    whole, few = slice(None), slice(None, None, 2)  # few: where much is drawn

    def say(chosen: slice, **more) -> tuple[dict, dict]:
        asked = {"prompts": [test["prompts"][i] for i in rows][chosen], "voices": prompts[chosen],
                 "languages": list(names[language[chosen]])}
        return timed_sample(run, len(asked["prompts"]), asked, seed, batch_size=25,
                            **settings | more)

    def judged(clips: list, chosen: slice) -> tuple[dict, list]:
        heard, vectors = listen(listener, clips)
        errors = {name: voice_error(vectors, others[chosen], speakers[chosen]) for name, others in
                  (("voice_error", of_prompts), ("voice_error_to_copies", of_copies))}
        return {"words_right": score_of(words[chosen], heard)} | errors, heard

    drawn, result = say(whole)
    right, heard = judged(cut(drawn), whole)
    result |= right
    for code, name in enumerate(names):
        chosen = np.flatnonzero(language == code)
        if len(chosen):
            result[f"words_right_{name}"] = score_of([words[i] for i in chosen],
                                                     [heard[i] for i in chosen])
    for suffix, clips in (("real", second), ("codec", codec_copies(codec, second))):
        result |= {f"{name}_{suffix}": value for name, value in judged(clips, whole)[0].items()}
    for stretch in STRETCHES:
        clips = cut(say(few, tempo=1 / stretch)[0])
        result[f"at {stretch:g} times the length"] = judged(clips, few)[0]
    for source, name in enumerate(names):  # the first parts are dubbed into all languages
        ours = np.flatnonzero(test["language"][rows, 0] == source)[:DUBBED]
        clips, digits = [first[i] for i in ours], []
        for i in ours:  # of the first part: all words but those of the second
            both = test["words"][rows[i]]
            digits.append((both[both >= 0] % 10)[: -len(words[i])])
        for target, other in enumerate(names) if len(ours) else ():
            dubbed = [clip for clip, *_ in dub(run, listener, clips, other, seed, **settings)]
            heard, vectors = listen(listener, dubbed)
            result[f"{name} to {other}"] = {
                "words_right": score_of([list(10 * target + row) for row in digits], heard),
                "voice_error": voice_error(vectors, of_prompts[ours], speakers[ours]),
                "length_error": max(abs(len(new) / len(old) - 1)
                                    for new, old in zip(dubbed, clips, strict=True))}
    write_samples(drawn, run, run.folder / "samples")
    return result


def off_pitch(clip: np.ndarray, score: songs.Song, root: int) -> np.ndarray:
    """By how many cents each note of a song (T,) is off, 1200 where no pitch is found. Measured
    from 35% to 90% of the note's time, where the vowel is."""
    wrong, start = [], 0.0
    for _, tone, length in score.notes:
        seconds = length * score.eighth
        part = clip[int((start + 0.35 * seconds) * SAMPLE_RATE):
                    int((start + 0.9 * seconds) * SAMPLE_RATE)]
        wanted, start = voices.midi_to_hertz(root + tone), start + seconds
        wrong.append(1200 * np.log2(sound_metrics.pitch(part) / wanted))
    return np.nan_to_num(np.abs(wrong), nan=1200)


def evaluate_songs(run: Run, dataset: Dataset, listener: Listener, n: int, seed: int,
                   settings: dict) -> dict:
    """Metrics of songs that are composed and sung for n prompts of the test data, in the key of the
    sampler: what is sung against the score, and the score's scale and words."""
    test = dataset.test
    rows = every(n, len(test["waveforms"]))
    drawn, result = timed_sample(run, len(rows), {"prompts": [test["prompts"][i] for i in rows]},
                                 seed, batch_size=25, **settings)
    key = (run.record["sampling"] | settings).get("key", songs.KEY)
    scores = [songs.from_text(text) for text in drawn["thoughts"]]
    clips = cut(drawn)
    real, written = ([test[name][i] for i in rows] for name in ("waveforms", "scores"))
    written = [songs.from_text(str(text)) for text in written]
    for suffix, sounds, sung, roots in (
            ("", clips, scores, [key] * len(clips)), ("_real", real, written, test["root"][rows]),
            ("_codec", codec_copies(run.model.codec, real), written, test["root"][rows])):
        words = [[songs.WORDS.index(word) for word, *_ in score.notes] for score in sung]
        cents = np.concatenate([off_pitch(*each) for each in zip(sounds, sung, roots, strict=True)])
        result |= {f"words_right{suffix}": score_of(words, listen(listener, sounds)[0]),
                   f"cents{suffix}": float(np.median(cents)),
                   f"within_50_cents{suffix}": (cents < 50).mean().item()}
    melodies = [[note[1:] for note in score.notes] for score in scores]
    known = [[note[1:] for note in songs.from_text(str(text)).notes]
             for text in dataset.train["scores"]]
    tones = [tone % 12 in songs.MOODS[score.mood] for score, melody
             in zip(scores, melodies, strict=True) for tone, _ in melody]
    fits = [word in songs.THEMES[score.theme] for score in scores for word, *_ in score.notes]
    result |= {"in_key": np.mean(tones).item(), "words_of_the_theme": np.mean(fits).item(),
               "melodies_of_the_training": np.mean([m in known for m in melodies]).item()}
    write_samples(drawn, run, run.folder / "samples")
    return result
