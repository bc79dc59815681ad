#!/usr/bin/env bash
# Prints the events of a subject as they happen, one JSON object per line.
#
#   ./subscribe.sh 'dbt.live.shop.prod.node.model.*.error'
#   NATS_URL=nats://nats.example.com:4222 ./subscribe.sh 'dbt.live.*.*.asset.*.*.failed' | jq .key
#
# With the `nats` command, if it is there: it does TLS, logins and reconnecting. Without it, bash speaks
# the NATS protocol itself: plain TCP, no login, and an end (exit code 1) when the server goes away.
# Our tests run the second way (bash 5.2, nats-server 2.15); of the first they see only the command.
# What happens while nobody listens is missed: subscribe.mjs misses nothing.

set -euo pipefail
subject=${1:-dbt.live.>}
url=${NATS_URL:-nats://127.0.0.1:4222}

if command -v nats >/dev/null; then
  exec nats --server "$url" sub --raw "$subject"
fi

export LC_ALL=C # lengths are bytes
address=${url#nats://}
exec 3<>"/dev/tcp/${address%:*}/${address##*:}"
printf 'CONNECT {"verbose":false,"headers":true,"name":"subscribe.sh"}\r\nSUB %s 1\r\nPING\r\n' "$subject" >&3

while IFS= read -r -u 3 line; do
  case ${line%$'\r'} in
    PING) printf 'PONG\r\n' >&3 ;;
    PONG) echo "listening to $subject" >&2 ;;
    -ERR*) echo "${line%$'\r'}" >&2 && exit 1 ;;
    MSG* | HMSG*) # MSG subject sid [reply] size, or HMSG subject sid [reply] header-size size
      read -r -a words <<<"${line%$'\r'}"
      header_size=0
      [[ ${words[0]} == HMSG ]] && header_size=${words[-2]}
      IFS= read -r -N "$header_size" -u 3 _headers || true
      IFS= read -r -N $((words[-1] - header_size)) -u 3 payload
      IFS= read -r -N 2 -u 3 _crlf
      printf '%s\n' "$payload"
      ;;
  esac
done
echo "$url is gone" >&2
exit 1
