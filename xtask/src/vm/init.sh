#!/bin/busybox sh
# The first process of the test machine: mounts what a Linux system has, runs the tests of /tests, switches the machine off.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /root /etc /var/run
/bin/busybox mount -t proc proc /proc
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export BEELINE_BIN_DIR=/beeline BEELINE_SLOW=10
for applet in $(/bin/busybox --list); do
    [ -e "/usr/bin/$applet" ] || [ -e "/usr/sbin/$applet" ] || /bin/busybox ln -s /bin/busybox "/usr/bin/$applet"
done
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ln -sf /usr/bin/modprobe /sbin/modprobe 2>/dev/null
echo /sbin/modprobe > /proc/sys/kernel/modprobe
echo 1 > /proc/sys/kernel/panic_on_oops
ip link set lo up
hostname vm
echo "beeline-vm: kernel $(uname -r)"
total=0 failed=0
while read -r limit name program args; do
    total=$((total + 1))
    begun=$(cut -d. -f1 /proc/uptime)
    # shellcheck disable=SC2086 # several words
    timeout -k 5 "$limit" "$program" $args > /tmp/output 2>&1 < /dev/null
    code=$?
    time=$(($(cut -d. -f1 /proc/uptime) - begun))
    if [ $code = 0 ]; then
        echo "beeline-vm: ok $name (${time} s)"
        [ "$VERBOSE" ] && cat /tmp/output
    else
        failed=$((failed + 1))
        cat /tmp/output
        echo "beeline-vm: FAILED $name (${time} s, code $code)"
    fi
done < /tests
/beeline/beeline-sweep --list | grep -E "bl[0-9]+-" && failed=$((failed + 1)) && echo "beeline-vm: FAILED nothing-left-behind"
echo "beeline-vm: $total tests, $failed failed"
poweroff -f
