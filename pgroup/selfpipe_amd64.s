#include "textflag.h"

#define SYS_write 1
#define SIGURG 23

// The kernel calls these with the signal in DI and the siginfo_t in SI, on the
// runtime's signal stack; the return address is that of rt_sigreturn.

TEXT selfPipe<>(SB),NOSPLIT|NOFRAME,$0-0
	MOVL	·selfPipeFD(SB), DI
	MOVL	$24, DX
	MOVL	$SYS_write, AX
	SYSCALL
	RET

// si_code is more than 0 for a fault, -6 (SI_TKILL) for the runtime's SIGURG.
TEXT selfPipeSent<>(SB),NOSPLIT|NOFRAME,$0-0
	MOVL	8(SI), AX
	CMPL	AX, $0
	JGT	runtimes
	CMPL	AX, $-6
	JNE	sent
	CMPL	DI, $SIGURG
	JEQ	runtimes
sent:
	JMP	selfPipe<>(SB)
runtimes:
	MOVQ	·goHandler(SB), AX
	JMP	AX

// func selfPipeHandler() uintptr
TEXT ·selfPipeHandler(SB),NOSPLIT,$0-8
	LEAQ	selfPipe<>(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

// func selfPipeSentHandler() uintptr
TEXT ·selfPipeSentHandler(SB),NOSPLIT,$0-8
	LEAQ	selfPipeSent<>(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
