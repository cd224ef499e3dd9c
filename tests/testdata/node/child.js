// A child for child_process.fork(): it sends, and answers each message, until it
// is disconnected.
process.on('message', m => process.send({ got: m }))
process.on('disconnect', () => require('fs').writeFileSync('disconnected', ''))
process.send({ foo: 'bar', baz: NaN, text: 'zwölf\n' })
