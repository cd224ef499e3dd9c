// A worker that makes the file argv[2], then says that it is ready in the way
// that it was asked to, and ends with 0 on TERM.
'use strict';
const fs = require('fs');
const { execFileSync } = require('child_process');

process.on('SIGTERM', () => process.exit(0));
fs.writeFileSync(process.argv[2], '');
if (process.env.PGROUP_READY_FD) {
  const fd = Number(process.env.PGROUP_READY_FD);
  fs.writeSync(fd, '\n');
  fs.closeSync(fd);
} else if (process.env.NOTIFY_SOCKET) {
  // Node has no Unix datagram sockets.
  execFileSync('systemd-notify', ['--ready']);
}
setTimeout(() => process.exit(1), 60000);
