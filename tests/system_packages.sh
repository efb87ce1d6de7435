#!/usr/bin/env bash
# What the tests need that pip cannot install: a browser for the attention page, a font with Japanese glyphs, Node.
set -euo pipefail

has_one_of() {
    local name
    for name in "$@"; do
        if command -v "$name" > /dev/null; then return 0; fi
    done
    return 1
}

missing=()
has_one_of chromium chromium-browser google-chrome || missing+=(chromium)
has_one_of chromedriver || missing+=(chromium-driver)
has_one_of node || missing+=(nodejs)
has_one_of npm || missing+=(npm)
# macOS has the font, and no fontconfig to ask.
[ "$(uname)" = Darwin ] || [ -n "$(fc-list :lang=ja 2> /dev/null)" ] || missing+=(fontconfig fonts-noto-cjk)
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

if [ "$(id -u)" -eq 0 ] && has_one_of apt-get; then
    apt-get update --quiet --quiet
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends "${missing[@]}"
else
    echo "The tests need: ${missing[*]}. On Debian: sudo apt-get install ${missing[*]}; elsewhere install Chromium," >&2
    echo "ChromeDriver, Node 20 with npm, and a Japanese font, for example Noto Sans CJK." >&2
    exit 1
fi
