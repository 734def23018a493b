#!/bin/sh
# What tests/cluster wants to have network namespaces as machines: Debian's ssh and iproute2. Nothing where it is there already.
set -eu
if command -v ip >/dev/null && command -v ssh >/dev/null && [ -x /usr/sbin/sshd ]; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "cluster-hosts: only root on Debian can install openssh-server, openssh-client and iproute2" >&2
  exit 0
fi
# No server of the machine's own is to be started by it; afterwards, however that went, they may be again.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
apt-get install -y --no-install-recommends openssh-server openssh-client iproute2
