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
# No server of the machine's own is to be started by it.
printf '#!/bin/sh\nexit 101\n' >/tmp/cluster-hosts-policy
chmod 755 /tmp/cluster-hosts-policy
had=no
[ -e /usr/sbin/policy-rc.d ] && had=yes || mv /tmp/cluster-hosts-policy /usr/sbin/policy-rc.d
apt-get install -y --no-install-recommends openssh-server openssh-client iproute2
[ "$had" = yes ] || rm -f /usr/sbin/policy-rc.d
