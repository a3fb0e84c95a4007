"""A program of its own, which makes sentences into WAV files by the shared library of eSpeak NG:

    python speak.py FOLDER < jobs.jsonl        # FOLDER holds libespeak-ng.so and espeak-ng-data

Each line of the input is {"voice", "rate" (words a minute), "pitch" (0 to 99), "text", "file"}.  The same lines in the
same order give the same sounds.  It needs nothing but Python, and runs as a process of its own: no code of that library
is ever part of a program that uses undula.
"""

import ctypes
import json
import sys
import wave
from pathlib import Path

SYNCHRONOUS, UTF8, NO_EXIT = 2, 1, 0x8000  # speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, espeakCHARS_UTF8, ..._DONT_EXIT
RATE, PITCH = 1, 3  # espeak_PARAMETER
SEED = 1  # of the noise in a voice
HEARD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main(folder: str) -> None:
    """Speaks every line of the standard input.  Exits with a message for a voice or a text that does not go."""
    library = ctypes.CDLL(str(Path(folder) / "libespeak-ng.so"))
    parts: list[bytes] = []

    @HEARD
    def heard(samples: object, count: int, _: object) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]
        return 0

    hertz = library.espeak_Initialize(SYNCHRONOUS, 0, folder.encode(), NO_EXIT)
    if hertz <= 0:
        sys.exit(f"eSpeak NG found no voices in {folder} (code {hertz})")
    library.espeak_SetSynthCallback(heard)
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    for line in sys.stdin:
        job = json.loads(line)
        parts.clear()
        text = job["text"].encode()
        failed = library.espeak_SetVoiceByName(job["voice"].encode())
        failed = failed or library.espeak_SetParameter(RATE, job["rate"], 0)
        failed = failed or library.espeak_SetParameter(PITCH, job["pitch"], 0)
        failed = failed or library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, UTF8, None, None)
        failed = failed or library.espeak_Synchronize()
        if failed or not parts:
            sys.exit(f"eSpeak NG said nothing for {job} (code {failed})")
        with wave.open(job["file"], "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(hertz)
            out.writeframes(b"".join(parts))


if __name__ == "__main__":
    main(sys.argv[1])
