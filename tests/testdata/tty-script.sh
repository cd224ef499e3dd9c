# A script without job control around the command that its arguments name.
case $1 in trap) trap 'echo "script INT"' INT; shift ;; esac
"$@"
echo "script goes on with $?"
read -r line
echo "script reads $line"
