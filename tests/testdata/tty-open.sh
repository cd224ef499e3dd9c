# Talks with the controlling terminal whatever its own streams are.
{ true </dev/tty; } 2>/dev/null || { echo "no terminal"; exit 3; }
echo "ready $$" >/dev/tty
read -r line </dev/tty
echo "line $line" >/dev/tty
